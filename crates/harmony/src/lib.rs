//! The Harmony chat format: the renderer and the total streaming parser.
