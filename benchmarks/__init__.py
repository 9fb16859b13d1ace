"""The demo, the benchmarks and the development environment they run in. Nothing here is part of the node pack."""
