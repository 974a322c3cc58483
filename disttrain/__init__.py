"""disttrain: distributed training that is killed anywhere, resumed anywhere, and gives the same bits."""
