"""What runs in the engine process around the model: V1 and V2 adapters, drafting, forward contexts, slot updates."""
