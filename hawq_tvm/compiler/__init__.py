"""From a model to a library: the pipeline, its inspection, and the compilers that it calls."""
