"""What users call: the Python class, the OpenAI server, and the text they both return."""
