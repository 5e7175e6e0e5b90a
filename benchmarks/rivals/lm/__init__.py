"""Ways to run a language model on one or two hosts: mlx-lm's, a pipelined prefill, and ringattn's."""
