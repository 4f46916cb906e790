"""What training costs: FLOPs, densities, and the ledger of a run."""
