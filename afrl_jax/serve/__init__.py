"""The HTTP service: grades at once, explanations as they are written, and a page to see both.

The rooms, from the street to the model:

    __main__    the command
    app         the application: start, errors, routes put together
    routes      what each address answers
    wire        requests and responses as they travel: those of Cohere, Jina, vLLM and SGLang, and the answer-first ones
    service     one request from admission to probabilities, and an explanation as it is decoded
    batching    requests of many clients in one batch; a bounded queue
    scorer      the one place that touches a RelevanceModel
    keys        API keys
    settings    what the service allows: sizes, times, places
    monitoring  the line a request leaves in the log, and Prometheus metrics
    refusals    errors that name the field and say what would be right
    page/       the page at /
"""
