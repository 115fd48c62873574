"""Load tests of a cluster: psctl bench.

    with Fleet(addresses, Plan(mix="B", clients=8)) as fleet:  # creates and fills its own tables
        result = fleet.run(rate=500, seconds=10)
    print(result.achieved, result.latency.percentile(99))

plan.py       what a load test sends: mix, keys, tables, clients
arrivals.py   when the requests of an open loop start
draws.py      which keys a request has: Zipf, uniform, recent keys
mixes.py      what a request does: pulls, pushes, training steps
latencies.py  histograms of latencies, merged over processes
worker.py     process that sends requests
result.py     what a run measured
fleet.py      the tables and processes of a load test
knee.py       the highest rate at which a cluster keeps its objective
shards.py     what the shards use during a run
sizing.py     how many shards a rate needs, in words
trial.py      a run, or a sweep that finds the knee
words.py      main figures and sentences about a load test
plots.py      plots as HTML and SVG, without scripts
report.py     a load test as an HTML page
live.py       figures of a run in the terminal, while it runs
"""
