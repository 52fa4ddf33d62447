"""The inference server. Its folders are the hops of a request, in order: api, routing, engine, model."""
