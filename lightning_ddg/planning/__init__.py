"""Numbers and pictures: simulated schedules, plans, tables. Neither Lightning nor ``torch.distributed``."""
