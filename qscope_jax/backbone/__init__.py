"""The Qwen text backbones as pure functions over pytrees."""
