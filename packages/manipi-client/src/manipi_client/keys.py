"""Keys that an observation may hold beside the robot's own; openpi's server ignores them.

manipi/deadline_ms    number   how long after its arrival an answer is of use (server and client)
manipi/reset          bool     a new episode: the noise starts again (the server)
manipi/prev_actions   [n, A]   what is left of the chunk that the robot is executing (the policy)
manipi/delay          int      how many of these it will have executed when the answer comes (the policy)
manipi/seed           int      what the noise of this answer is drawn from (the policy)
manipi/num_steps      int      integration steps of this answer, instead of the policy's own (the policy)
manipi/temperature    number   of an answer that is written in tokens; 0: the likeliest (the policy)
manipi/mode           text     `flow` or `tokens`, of a policy that does both (the policy)
manipi/subtask        text     what is to be done at present, which the actions of this answer follow (the policy)
manipi/write_subtask  bool     write it before the actions; `manipi/subtask` is what stays if that fails (the policy)
manipi/candidates     int      chunks of a flow policy to draw for this answer, of which one is chosen (the policy)
manipi/selector       text     what chooses among them, by its name at the server (the policy)
manipi/gate           number   how uncertain the first of them has to be for the others to be drawn (the policy)
manipi/execute_steps  int      steps of the chunk that will be executed, which the choice looks at (the policy)
manipi/step           int      the step of the episode (logs, recordings, what the server remembers)
manipi/past           list     older observations of a policy that remembers, the oldest first; null: none (the policy)
"""

DEADLINE = "manipi/deadline_ms"
RESET = "manipi/reset"
PREVIOUS = "manipi/prev_actions"
DELAY = "manipi/delay"
SEED = "manipi/seed"
NUM_STEPS = "manipi/num_steps"
TEMPERATURE = "manipi/temperature"
MODE = "manipi/mode"
SUBTASK = "manipi/subtask"
WRITE_SUBTASK = "manipi/write_subtask"
CANDIDATES = "manipi/candidates"
SELECTOR = "manipi/selector"
GATE = "manipi/gate"
EXECUTE_STEPS = "manipi/execute_steps"
STEP = "manipi/step"
PAST = "manipi/past"
