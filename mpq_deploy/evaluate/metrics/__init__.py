"""How the images of two models are distributed: Frechet distances, KID, precision and recall on feature networks."""
