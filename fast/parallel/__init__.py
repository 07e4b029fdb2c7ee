"""A long text's training step, shared among processes: layer-level pipeline parallelism.

The chunks of a text are dealt to workers. All that a layer of one chunk needs of the chunk before it
is that layer's two memories, so a worker sends them on as soon as the layer is done, and the next
worker starts there while the first goes on to the next layer. See docs/pipeline.md.
"""

from .pipeline import Pipeline
from .ring import WorkerLostError, init_pipeline_mesh
from .step import Span

__all__ = ["Pipeline", "Span", "WorkerLostError", "init_pipeline_mesh"]
