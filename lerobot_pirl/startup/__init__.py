"""What happens at interpreter start: the start-up lines, the finder they install, its targets."""
