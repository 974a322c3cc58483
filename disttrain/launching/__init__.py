"""HOW ranks are started: the only code that touches the internals of torchrun and of multiprocessing.

    torchrun           runs torchrun in this process, forks its ranks off one server, returns the run's exit code
    recovering_agent   torch's agent for runs that recover in place: replaces a rank, and lets the others run
    membership         who is in the run: the agreement of ranks and agents, as pure functions
    procedures         how they agree: the steps, without a store or a clock
    generations        a rank's side of it, over the store of the agents
    running_launch     where the agents agree, and how one that comes later finds those that run
    process_watch      which ranks of a host have ended or are stopped, and the lease of its agent
    recovery_variables what an agent tells its ranks about it
    killed_ranks       tells of ranks that were killed, in place of the messages of torchrun's agent
    elastic            the rendezvous of torchrun's agents, which an agent leaves without closing it
    local_ranks        starts ranks on this host without torchrun, for `disttrain verify`
    interpreter        starts them in an interpreter of its own with other surroundings, for `disttrain verify`
    pet_variables      torchrun's own variables, as the defaults of a launch or hidden from its parser
    end_with_launcher  lets the kernel kill a rank whose torchrun was killed

| noun     | meaning                                                                             |
|----------|-------------------------------------------------------------------------------------|
| launcher | the process that started the ranks: torchrun, or srun                               |
| agent    | the torchrun process of one host; it watches the ranks of that host                 |
| server   | the process of this host that imports torch once, and off which the ranks are forked |
| member   | a rank of a run that recovers in place, under a name that no other rank ever has    |
| generation | the members between two changes of who they are                                   |
| grace    | the seconds that a rank has from a signal to SIGKILL                                |
"""
