"""What estimates and caches do to students: errors and training curves on real models."""
