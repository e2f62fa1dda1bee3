"""Networks and tokenizers."""
