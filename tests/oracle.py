from ringattn.verify.oracle import *  # noqa: F403
