"""What torch sees of the engine: custom ops, their fake implementations and gradients. Imports `backends` and all below."""
