"""What torch sees of the engine: custom ops, their fake implementations and gradients.

It imports `backends`, `call`, `divergences`, `estimators`, `listed`, `memory` and `schedule`.
"""
