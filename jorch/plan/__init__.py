"""`jorch plan`: whether a config fits its accelerators, and what a step costs, before anything is rented."""
