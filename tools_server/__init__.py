"""The asyncio tool server: tools, experts and environments behind one JSON interface."""
