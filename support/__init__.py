"""What supports the scripts. A reader of the method needs none of it at first."""
