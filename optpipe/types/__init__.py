"""What flows between rooms: frozen values, and the protocols at the seams.

Values are JSON-able unless they say otherwise. Nothing here touches a file, a clock or a device.
"""

from optpipe.types.measurement import DeviceState, Fingerprint, Latency, Precision, Quality, Target
from optpipe.types.network import Block, ChannelGroup, ModelGraph, Plan
from optpipe.types.seams import Backend, Emit, Engine, EngineCount, Event, Method, Sample, Session
from optpipe.types.search import (
    Answer,
    Ask,
    Budget,
    Cell,
    Choice,
    Images,
    Interim,
    Request,
    Scene,
    Search,
    Step,
    StepResult,
    Table,
    Train,
    Trained,
    Trial,
    Tune,
    Want,
)

__all__ = [
    "Answer",
    "Ask",
    "Backend",
    "Block",
    "Budget",
    "Cell",
    "ChannelGroup",
    "Choice",
    "DeviceState",
    "Emit",
    "Engine",
    "EngineCount",
    "Event",
    "Fingerprint",
    "Images",
    "Interim",
    "Latency",
    "Method",
    "ModelGraph",
    "Plan",
    "Precision",
    "Quality",
    "Request",
    "Sample",
    "Scene",
    "Search",
    "Session",
    "Step",
    "StepResult",
    "Table",
    "Target",
    "Train",
    "Trained",
    "Trial",
    "Tune",
    "Want",
]
