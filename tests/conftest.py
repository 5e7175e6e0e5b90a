"""What all tests share."""

import mlx.core as mx

mx.set_default_device(mx.cpu)
