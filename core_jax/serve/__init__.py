"""The search engine over HTTP, and a page that shows what a rewrite changed, stage by stage."""
