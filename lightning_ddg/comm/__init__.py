"""Messages between the ranks of a pipeline, over ``torch.distributed``."""
