"""Search in three stages, recall, rawrank and finerank, which take rewrites beside the query, never in its place."""
