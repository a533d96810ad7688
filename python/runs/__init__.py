"""Training runs from the command line: texts, the loop, checkpoints, reports, and the demo.

It imports `cache`, `losses`, `measuring`, `models`, `progress_bar` and `user_error`.
"""
