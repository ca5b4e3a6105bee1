"""Write nodes and constants of schemes and branches into a graph, and the graphs into files."""
