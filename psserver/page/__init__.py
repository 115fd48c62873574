"""The status page of the HTTP port: its elements, its looks and its scripts.

document.py  put all of them into one HTML file

page.html has the elements and page.css the looks. The scripts are figures.js (rates and sums from
two documents of /status.json), plots.js (the plots) and page.js (the elements, each second). uPlot
draws the plots; uPlot.LICENSE.txt has its licence.
"""
