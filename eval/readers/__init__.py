"""Users' own data for the tasks: each reader turns files into texts and what is known of them."""
