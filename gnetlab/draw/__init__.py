"""Drawing: frames in, figures out. Imports matplotlib and pandas, never torch or measure.

figures, plots     whole figures and `save()`; single panels
gradients, units   the same for gradients and training, and for what channels select for
explorer, sliders  what can be clicked and moved
style              colours, sizes, fonts
calls, redraw      figures drawn again from what was kept
"""
