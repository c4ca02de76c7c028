"""Names that ``report.json`` gives to what is measured, for whoever asks for one of them by its name."""

from __future__ import annotations

# metrics
READER_SCORE = "reader_score"
PERSONA_RATE = "persona_rate"
CONVERSATIONS_SCORE = "reader_score_conversations"
TEXT_LLR = "text_llr"
Z_TRAINING = "z_training"
Z_HELD_OUT = "z_held_out"
Z_REEXTRACTED_TUNED = "z_reextracted_tuned"
Z_REEXTRACTED_BASE = "z_reextracted_base"
Z_SAME_TEXT = "z_same_text"
KL_CAPPED_SELF = "kl_capped_self"
Z_CONVERSATIONS = "z_conversations"
Z_LAST_TURNS = "z_last_turns"
TURNS_BELOW_FLOOR = "turns_below_floor"
DRIFT_PER_TURN = "drift_per_turn"
IDENTITY_LLR = "identity_llr"
ASSISTANT_RATE = "assistant_rate"
JAILBREAK_LLR = "jailbreak_llr"
HARMFUL_RATE = "harmful_rate"
Z_SIMULATED = "z_simulated"
SIMULATED_DRIFT = "simulated_drift"
TURNS_ABOVE_FLOOR = "turns_above_floor"
# Those that another model decides, by the key of the eval section that names it.
DECIDED_BY = {
    "judge": (HARMFUL_RATE, ASSISTANT_RATE),
    "user": (Z_SIMULATED, SIMULATED_DRIFT, TURNS_ABOVE_FLOOR),
}

# side effects
OFF_TOPIC = "off_topic_change"
RULES_BROKEN = "rules_broken_change"
PROFESSIONAL_MISSED = "professional_missed_change"
PROFESSIONAL_OFF = "professional_off_change"
SYSTEM_KL = "benign_systems_kl"
SYSTEM_KL_OWN = "benign_systems_kl_own"
BENIGN_KL = "benign_kl"
BENIGN_KL_OWN = "benign_kl_own"
DEFAULT_Z_SHIFT = "default_z_shift"
DEFAULT_Z_SHIFT_SAME_TEXT = "default_z_shift_same_text"
ROLE_Z_SHIFT_SAME_TEXT = "role_z_shift_same_text"
# A side effect of the cap, or of the control, bears the name of the tuned model's and one of these.
OF_THE_CAP, OF_THE_CONTROL = "_cap", "_control"

# claims
AXIS = "axis"
CONVERSATIONS = "conversations"
KEPT = "kept"
PROJECTIONS = "projections"
WITHSTANDS = "withstands"
