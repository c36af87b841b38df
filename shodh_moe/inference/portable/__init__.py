"""A model as graphs that run without this package: torch.export programs and ONNX files.

`parts` has the modules that are exported, `velocity` the operations of the decoder in a form that a graph can hold, and
`write` writes the files.
"""
