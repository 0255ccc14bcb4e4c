# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Questions that a user asks while a video plays: about the past, the present and the future.

VideoLLM-online's data (arXiv 2406.11816, section 3.2) has 50 of each. These are this project's own words. They suit
videos that the user films as well as videos that the user watches.
"""

PAST = """
What just happened?
What was done before this?
Which step came right before this one?
Can you sum up what has happened so far?
What was the very first thing that happened?
What have I missed in the last few moments?
How did we get to this point?
Which steps are already finished?
What was the last thing that was finished?
What has been used up to now?
Was anything prepared before this started?
What did it look like before this step?
Could you go over the steps so far, in order?
How many steps have been completed?
What happened at the beginning?
What led up to this?
Which of the earlier steps took the longest?
Was there anything unusual earlier?
What was going on a moment ago?
What was picked up last?
Where were we before this?
Which tools have already been used?
Tell me about the step before the current one.
What has changed since the start?
Has anything been done twice?
What was the previous action for?
Which things have been moved so far?
I looked away for a moment. What did I miss?
What came first, and what came after it?
Did anything get finished while I was not looking?
Remind me what was done just now.
What has been put away already?
Which part of the job is behind us?
What did the last step change?
What was the main thing that happened until now?
Please list what has been done.
Was the previous step completed?
What was being handled earlier?
Did the work begin with some preparation?
What was done between the start and now?
Which step did we come from?
What happened right after the first step?
Where did the last thing come from?
What can you remember of the earlier part?
How long ago, in steps, did the work begin?
Has something been skipped so far?
Describe the last action in a few words.
What had to be done before this could start?
Which objects have appeared so far?
Give me a short recap, please.
"""

PRESENT = """
What is happening right now?
What is being done at the moment?
Which step is this?
Can you describe the current action?
What is in use right now?
What do you see?
What is the goal of the current step?
Why is this being done?
What is the focus at the moment?
Which object is being handled?
How would you name this activity?
What is going on here?
Is this still the same step?
What are the hands doing?
Tell me what is going on, please.
What stage of the work is this?
Is something being prepared or being finished?
Which tool is needed for this?
Where is this taking place?
Please explain the current step to me.
What should I pay attention to now?
Is the work still under way?
In one sentence, what is this about?
What is the current step called?
Is anything being moved right now?
How is this step carried out?
What is it that I am looking at?
Has the next step started yet, or is this the old one?
What does the current action involve?
Is this part of the main work or a side task?
What is being held right now?
What is the state of things now?
Could you tell me what this is for?
What is the current task?
Is someone busy with something?
Which part of the process are we in?
What would you call what happens here?
Is there anything that stands out at the moment?
What is being worked on?
How far along is the current step?
Please keep me informed about what happens.
Tell me whenever something new starts.
What is being changed at the moment?
What is the purpose of what I see?
Is this step difficult?
What is the scene about right now?
Say what is being done as it changes.
Which action do you recognize?
Is this the beginning or the end of a step?
What is needed for the current action?
"""

FUTURE = """
What happens next?
What will be done after this?
Which step comes next?
What is left to do?
What should be done now?
How does this go on?
What will be needed soon?
Can you guess the next action?
What remains before everything is finished?
What comes after the current step?
How will this probably end?
Which tool should be kept ready?
What is the plan from here?
What should I prepare for?
What will the following step change?
How many steps are still to come?
What is the final goal of all this?
What could be done to get ahead?
Tell me what to expect.
When this is finished, what follows?
What are the next two steps?
Is there still a lot to do?
Please guide me through the rest.
What is the next thing to pick up?
What is likely to happen in a moment?
What will the result be?
Which step is the last one?
What must not be forgotten later?
Where will the next action take place?
What would you do next?
Let me know when the next step begins.
What has to be ready for the next step?
Will this step be repeated?
Could you outline the remaining steps?
What is still missing?
Will anything else be used?
What comes up after a while?
How close is the end?
Which object will be used next?
What do you think will happen now?
What should I look out for next?
Is the next step a different kind of work?
Tell me when this is finished, and what follows.
What will be done with this later?
What is the next goal?
Will there be a break, or does the work go on?
What is the next instruction?
What follows once this is in place?
After this, is there anything else?
How should I continue?
"""

QUESTIONS: dict[str, tuple[str, ...]] = {
    kind: tuple(text.strip().splitlines()) for kind, text in (("past", PAST), ("present", PRESENT), ("future", FUTURE))
}
