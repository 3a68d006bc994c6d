def run_cost(quick, say): return None
