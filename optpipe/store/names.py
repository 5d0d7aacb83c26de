"""What files and stages of a run are called."""

from __future__ import annotations

RECIPE = "recipe.toml"
EVENTS = "events.jsonl"
CACHE = ".optpipe-cache"
SHARED = "shared-name"
WEIGHTS = "weights.safetensors"
STAGES = ("ingest", "analyze", "prune", "recover", "export", "benchmark")
