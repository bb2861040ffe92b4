"""Pure maths on sparse codes: no model, no files."""
