"""The Trainers of transformers and TRL with the losses of this library. May import `losses`, `models` and `cache`."""
