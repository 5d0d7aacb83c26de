"""report.json, its rendering and the gate over it."""
