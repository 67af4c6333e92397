"""Speed of fusedrnn beside torch's own layers."""
