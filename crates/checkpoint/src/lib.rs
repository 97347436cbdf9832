//! Model folders: safetensors, configuration, the on-disk layouts of gpt-oss and the hub.
