"""raydetr: train, evaluate, register and serve DETR on Ray."""
