"""Pure functions over tensors: the maths of the audit, without files, configuration or devices.

Modules: `contrastive` (losses over candidates), `uncertainty` (energy, entropies), `self_paced` (weights and
division by loss), `mutual_information` (closed-form variation), `neighbours` (agreement with nearby pairs),
`known_swaps` (noise rate and probability from deliberately mismatched pairs).
"""
