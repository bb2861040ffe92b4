"""Text in, features out: readers, tokenizers and the feature store."""
