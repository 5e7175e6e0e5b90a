"""``ringattn demo``: a whole language model reads a real document, spread over several processes, and answers."""
