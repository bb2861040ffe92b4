"""What features do: counted over text, found by contrast, compared, blamed for an answer."""
