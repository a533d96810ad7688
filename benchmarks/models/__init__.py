"""What the library makes of the transformers library's models: tiny random ones of every architecture."""
