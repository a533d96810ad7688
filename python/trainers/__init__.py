"""The Trainers of transformers and TRL with the losses of this library. It imports `cache`, `losses` and `models`."""
