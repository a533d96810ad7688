"""Time and memory of the losses on this machine's CPU: python -m pytest -c benchmarks/pytest.ini benchmarks/timing"""
