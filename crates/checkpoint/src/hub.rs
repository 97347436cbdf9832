//! Fetching a model by hub name into the standard cache.
