"""``ringattn demo``: the first layers of a real language model read a long real text, spread over several processes."""
